"""Ray as a starter: a driver with one actor on each host, whose agent it runs; the run is shoal's.

What is printed imports ray and nothing of shoal. Ray gives processes, and says who has died; who
trains together is the coordinator's word.
"""

from __future__ import annotations

from shoal.launch.clusters.start import Start

_DRIVER = '''\
"""A run of shoal on a Ray cluster: python FILE, or ray job submit --working-dir . -- python FILE"""
import signal, subprocess, sys
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NUM_HOSTS, CPUS, HOSTS = {num_hosts}, {cpus}, {hosts!r}
AGENT = {agent!r}
COORDINATOR = {coordinator!r}

@ray.remote(max_restarts=0, max_concurrency=8)
class Host:
    def address(self):
        return ray.util.get_node_ip_address()
    def run(self, command):
        self.last = subprocess.Popen(["bash", "-c", "exec " + command])
        return self.last.wait()
    def stop(self):
        self.last.send_signal(signal.SIGTERM)

def host(number):
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
    return Host.options(num_cpus=CPUS, scheduling_strategy=place).remote()

ray.init()
group = placement_group([{{"CPU": CPUS}}] * NUM_HOSTS, strategy="STRICT_SPREAD")
ray.get(group.ready())
actors = [host(number) for number in range(NUM_HOSTS)]
addresses = ray.get([each.address.remote() for each in actors])
with open(HOSTS, "w") as file:
    file.writelines(each + ":{port}\\n" for each in addresses)
agents = {{actors[number].run.remote(AGENT): number for number in range(NUM_HOSTS)}}
leads, asked = 0, []
run = actors[leads].run.remote(COORDINATOR)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(actors[leads].stop.remote()))
while True:
    for done in ray.wait([run, *agents], timeout=1.0)[0]:
        try:
            status = ray.get(done)
        except ray.exceptions.RayActorError:  # its host has gone
            if done == run:
                leads = (leads + 1) % NUM_HOSTS
                run = actors[leads].run.remote(COORDINATOR)
            else:
                number = agents.pop(done)
                actors[number] = host(number)  # once Ray has a host for it
                agents[actors[number].run.remote(AGENT)] = number
            continue
        if done == run:
            sys.exit(status)
        agents.pop(done)
'''


def driver(start: Start, *, cpus: int) -> str:
    """A program for the Python that has ray. `cpus`: of each host, as Ray counts them."""
    hosts = f"{start.keys}.hosts"
    known = {"num_hosts": start.num_hosts, "cpus": cpus, "port": start.port, "hosts": hosts}
    return _DRIVER.format(**known, agent=start.agent, coordinator=start.coordinator(hosts))
