"""Tables, figures and reports of studies."""
