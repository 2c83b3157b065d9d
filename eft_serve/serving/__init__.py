"""What joins the floor below without Ray: a coordinator behind its sockets, and the output that an ingress collects."""
