"""Command line of camserve, load generator, studies of many images, and HTML reports."""
