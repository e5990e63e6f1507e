"""An fxopt pass, a backend, and an operator with its channel rule, in a package of their own."""
