"""Reports of studies: tables in Markdown, and a page of one file with tables and plots."""
