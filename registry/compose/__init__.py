"""From a composition such as `medicine+legal` to a model, a route, and an answer."""
