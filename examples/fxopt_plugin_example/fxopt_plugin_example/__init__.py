"""An fxopt pass, and an operator with its channel rule, in a package of their own."""
