"""The network and what happens to its images on the device."""
