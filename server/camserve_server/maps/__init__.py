"""Functions of saliency maps, activations and boxes that several methods and metrics share."""
