"""A web page to draw on and a JSON interface for programs, before trained networks: `dist-mnist serve`."""
