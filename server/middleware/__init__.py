"""What stands between the socket and the routes: one ASGI layer a file, each with one concern."""
