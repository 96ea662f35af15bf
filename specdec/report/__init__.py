"""Pages, plots and comparisons of finished cells."""
