"""What a run will take, before it is started: memory, time, bytes over the links, disk; and which layout is best."""
