"""Room 3: conversations ⇄ ids. Messages become ids here, with nothing forgeable in between."""
