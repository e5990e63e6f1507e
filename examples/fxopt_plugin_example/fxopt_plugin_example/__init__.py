"""An fxopt pass in a package of its own."""
