"""How families of experiments train and judge. A protocol names no paper; papers pass in what is theirs."""
