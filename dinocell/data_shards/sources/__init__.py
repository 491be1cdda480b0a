"""Where fields of view come from: folder layouts, file name patterns, tables, single files."""
