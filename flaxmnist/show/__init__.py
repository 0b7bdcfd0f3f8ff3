"""Text tables, figures and pages for people to look at. Only this package uses Matplotlib."""
