"""Web server for trained networks: a page to draw digits on and a JSON API. `dist-mnist serve`."""
