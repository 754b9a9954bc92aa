"""Between text and tokens: chat templates, incremental detokenising, stop strings."""
