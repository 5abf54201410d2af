"""Engine: scheduler, lanes and the thread that runs the batches of one device.

This module imports nothing, so that the scheduler can be imported without torch.
"""
