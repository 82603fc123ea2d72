"""How anything is timed, counted, recorded and reported."""
