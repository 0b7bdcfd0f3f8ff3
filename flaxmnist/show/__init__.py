"""What a person looks at: text tables, figures, pages. Only this package uses Matplotlib."""
