"""Where minilora meets the platforms that models live on; each needs an extra, and is imported when it is asked for."""
