"""Around the library: checks of the files that clusters start from, the watcher of spot nodes, GGUF files, a dashboard."""
