"""MLflow: points go into a file first, and from there to the server."""
