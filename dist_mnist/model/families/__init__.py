"""The networks that come with this package."""
