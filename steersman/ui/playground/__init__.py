"""The playground of `steersman ui`: a page on which one model is steered and looked at, and the server behind it.

`state` is what the panel asks for; `engine` is what that means, built on the public objects alone; `queue` gives the
one model to one job at a time; `security` decides who may ask; `app` has the routes and `serving` opens the port.
"""
