"""The fault campaign, `make faults`: kills, torn writes, damaged files, full disks; what was tried and what was lost is counted."""
