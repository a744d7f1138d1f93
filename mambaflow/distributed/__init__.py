"""The one wing that imports Ray: a cluster, training and staging on it."""
