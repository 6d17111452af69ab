"""Reading configurations and traces: parameters and costs, routers' decisions."""
