"""Studies behind `camserve evaluate`: scores and maps of many images, saved to files."""
