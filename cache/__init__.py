"""The feature cache: the file format, its one writer and its one reader. Knows no LLM and no head."""
