"""The network, and augmentation of its images on the device."""
