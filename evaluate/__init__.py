"""Stage three: figures, tables, plots and a report from trained heads; scores for new texts."""
