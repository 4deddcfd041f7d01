"""What a run needs of machines, storage and cluster, looked at before it is started."""
