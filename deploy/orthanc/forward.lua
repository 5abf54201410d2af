-- Send each image that Orthanc receives to the gateway, except for the results that the gateway stores in Orthanc.
-- The gateway would drop its own results anyway.
function OnStoredInstance(instanceId, tags, metadata, origin)
  if origin['RequestOrigin'] == 'DicomProtocol' and origin['RemoteAet'] == 'CAMSERVE' then
    return
  end
  SendToModality(instanceId, 'gateway')
end
