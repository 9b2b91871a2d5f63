"""What a layout costs, before it is started: memory, kernels, communication, seconds. No device, no process group."""
