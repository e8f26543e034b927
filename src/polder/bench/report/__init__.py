"""From records to figures, checks, tables and pages."""
