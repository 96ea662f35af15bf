"""Training of drafters: `specdec train KIND`. What a kind has to bring is in `objective`; the loop is in `trainer`."""
