"""What people do around a layer, none of it needed by one: swap it into models, upcycle, watch, plan, audit, draw."""
