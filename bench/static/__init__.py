"""What can be known of the kernels without a GPU: launches, allocations, compiled code, traffic."""
