/** What goes wrong, by the names that all peers of a swarm use for it: `PeerUnreachableError`, `ProtocolError`, … */
export class SwarmError extends Error {
  constructor (name, message) {
    super(message)
    this.name = name
  }
}

/** Settle as `promise` does, or fail after `seconds`. */
export async function within (seconds, promise, what) {
  let timer
  const late = new Promise((resolve, reject) => {
    timer = setTimeout(() => reject(new SwarmError('DeadlineExceededError', `${what} took more than ${seconds} s`)),
      seconds * 1000)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}
