"""What is published beside the weights: how they were made, a card for the Hub, a page to look at; and its way to the Hub."""
