"""Process-wide settings of torch: device, memory allocator, and operators of torchvision."""
