"""Tables, figures and report.html, from the files that runs left."""
