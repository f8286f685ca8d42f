// Which address shows which page. A page is `make(context)` and gives
//   title()  what it is called          load()  reads what it shows; called again after `reset`
//   view()   elements from what is read on      handlers for changes on the stream
//   end()    tidies up (optional)

import audit from './pages/audit.js';
import balance from './pages/balance.js';
import cluster from './pages/cluster.js';
import events from './pages/events.js';
import ha from './pages/ha.js';
import host from './pages/host.js';
import hosts from './pages/hosts.js';
import job from './pages/job.js';
import jobs from './pages/jobs.js';
import overview from './pages/overview.js';
import policies from './pages/policies.js';
import policy from './pages/policy.js';
import repositories from './pages/repositories.js';
import repository from './pages/repository.js';
import restore from './pages/restore.js';
import settings from './pages/settings.js';
import vm from './pages/vm.js';
import vms from './pages/vms.js';

const ROUTES = [
  ['/', overview],
  ['/vms', vms],
  ['/vms/:vm', vm],
  ['/vms/:vm/restore', restore],
  ['/hosts', hosts],
  ['/hosts/:host', host],
  ['/cluster', cluster],
  ['/ha', ha],
  ['/balance', balance],
  ['/jobs', jobs],
  ['/jobs/:job', job],
  ['/policies', policies],
  ['/policies/:policy', policy],
  ['/repositories', repositories],
  ['/repositories/:repository', repository],
  ['/events', events],
  ['/audit', audit],
  ['/settings', settings],
];

/** A part of an address as it was meant; what cannot be read stands for itself. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** The page of an address and what is in it; null if there is none. */
export function find(pathname) {
  const parts = pathname.split('/');
  for (const [pattern, make] of ROUTES) {
    const wanted = pattern.split('/');
    if (wanted.length !== parts.length) continue;
    const params = {};
    const fits = wanted.every((word, at) => {
      if (!word.startsWith(':')) return word === parts[at];
      params[word.slice(1)] = decoded(parts[at]);
      return parts[at] !== '';
    });
    if (fits) return { make, params };
  }
  return null;
}
