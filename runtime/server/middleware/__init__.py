"""What stands before the application, as pure ASGI: each module one concern, none knows of the engine."""
