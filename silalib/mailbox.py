"""The mailbox of runs on a Ray cluster, in a module without torch: its process starts quickly."""


class Mailbox:
    """An actor beside the driver: what the workers have said, and whether they shall stop."""

    def __init__(self):
        self.messages, self.stopped = [], False

    def tell(self, message):
        self.messages.append(message)

    def stop(self):
        self.stopped = True

    def is_stopped(self):
        return self.stopped

    def collect(self):
        messages, self.messages = self.messages, []
        return messages
