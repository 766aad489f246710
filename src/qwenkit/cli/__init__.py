"""Room 9: the commands, one a file, each imported only when it is called.

Only this room prints, reads environment variables for the user and talks to a terminal. It must
not offer anything that another room does not do: a command reads options, calls, and shows.
"""
