"""Starting runs: on this machine, on clusters, again after an interruption, and every entry of a config's sweep."""
