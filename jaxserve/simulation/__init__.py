"""The engine without a device: the same scheduler and control flow, with a clock and a cost model in place of the runner."""
