"""What a worker needs of its machine: storage, leases, the lane, deadlines, private folders, conditions."""
