"""The operations arranged for a CPU, in stock torch operations."""
