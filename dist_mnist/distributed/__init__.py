"""World, devices, process group and collectives."""
